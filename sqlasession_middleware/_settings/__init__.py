"""The settings: which ones there are, how an ini section is read, and how arguments are checked.

Belongs here: the tables of options, the kinds of their values, the reader of ini sections, and checks that need no
engine. Does not belong here: what an option does.
"""
