"""What the inspector is made of: requests that are kept as data, the pages that show them, and who may see these.

Does not belong here: what is recorded, and how secrets are masked, which is ``_recording``. Nothing of this room is
imported before an inspector is made.
"""
