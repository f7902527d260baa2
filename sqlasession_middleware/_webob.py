"""WebOb, imported without its warning: WebOb 1.8 imports ``cgi``, which is nothing that our users could mend."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "'cgi' is deprecated", DeprecationWarning)
    from webob import Request
    from webob.exc import HTTPInternalServerError, HTTPNotFound, HTTPServiceUnavailable

__all__ = ["HTTPInternalServerError", "HTTPNotFound", "HTTPServiceUnavailable", "Request"]
