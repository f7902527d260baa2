"""How a scope lives: current in each step of a response's body, or in a ``with`` block, and then ended.

Belongs here: the iterators that a server gets, contexts, and the finishers. Does not belong here: decisions about
commits and answers (``_transaction``, ``unavailable``).
"""
