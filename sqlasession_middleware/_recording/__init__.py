"""What requests do to databases, as data.

Belongs here: listeners that note what is sent and waited for, and what can be read out of that. Does not belong here:
how it is shown, which its readers decide. Nothing of this room is imported, nor does it listen, before a reader asks.
"""
