"""What the bodies of several protocols have in common: constraints, sampling, tools, and fields that are refused.

Values as clients send them enter; options of `Model.submit` leave.
It knows no routes and no replies.
"""
