"""Imports WebOb without the deprecation warning for ``cgi``, which WebOb 1.8 imports and users cannot avoid."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "'cgi' is deprecated", DeprecationWarning)
    from webob import Request, Response
    from webob.exc import HTTPInternalServerError, HTTPNotFound, HTTPServiceUnavailable

__all__ = ["HTTPInternalServerError", "HTTPNotFound", "HTTPServiceUnavailable", "Request", "Response"]
