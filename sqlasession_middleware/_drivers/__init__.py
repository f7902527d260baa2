"""What differs from one database server, or one driver, to the next.

Belongs here: tables of error codes, SQL that only one server understands, attributes of a driver's connections and
errors, and each other answer that depends on them. Does not belong here: what follows from the answer.

``server`` and ``driver`` have the questions, with the careful answers for a database that nothing is known of. Each
server and each driver is a module with the answers that differ, and ``registry`` lists the drivers and finds the one to
ask.
"""
