"""A Ray cluster: items → answers on many nodes, and the HTTP server as a deployment of Ray Serve.

Items of a batch enter, answers leave, in any order; or HTTP requests, through Ray's proxy. Every node loads the model
from a path that it sees, or pulls it. This room schedules nothing: Ray does. Needs the extra [ray].
"""
