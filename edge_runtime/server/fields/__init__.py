"""What the bodies of several protocols have in common: constraints, sampling, tools, and refused fields.

Values as clients send them enter; options of `Model.submit` leave.
It knows no routes and no replies.
"""
