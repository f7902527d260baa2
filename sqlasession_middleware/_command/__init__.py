"""What the command ``sqlasession`` does, behind its options.

Belongs here: how an ini file is read and loaded, what each command does with it, what it prints, and how it fails. Does
not belong here: the commands themselves, their options and their help (``cli``), and anything that a program without
the command needs. The modules import click and PasteDeploy; ``cli`` has made sure that both are installed.
"""
