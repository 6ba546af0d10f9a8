"""The composition root: the only package that joins `tee/`, `wire/` and `gpu/` into sessions."""
