"""The composition root: the only package that joins the trusted side and workers."""
