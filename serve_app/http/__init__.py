"""Sampling over HTTP: OpenAI's API, keys, limits, refusals.

- routes.py: the routes, and the way of a request.
- openai.py: the shapes of requests and answers.
- access.py: who may ask, and how much at once.
- refusals.py: errors as statuses, bodies that are too large.
- events.py: server-sent events.
- sealed.py: bodies sealed between Serve's proxy and a replica.

It imports `serve_app.replica`. How the application is deployed is left to `serve_app`.
"""
