"""What a TenantsMiddleware is made of: who the tenant is, whether there is one of that name, and its application.

Belongs here: how the name is found in a request and checked, how URLs and settings are made of it, and which tenants'
applications are kept. Does not belong here: anything that is the same for an application without tenants.
"""
