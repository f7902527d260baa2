"""One attempt at a request in a transaction: holds back the response, and ends the transaction.

Belongs here: what :class:`~sqlasession_middleware.transaction.TransactionMiddleware` does with one call of the
application. Does not belong here: its options and the repetition of requests (``transaction``).
"""
