"""Workers on a Ray cluster: `tsqp cluster`. The only package that imports Ray.

Nothing here runs in a TEE. A TEE reads the file that `tsqp cluster up` writes.
"""
