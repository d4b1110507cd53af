"""Serves sampling over HTTP: OpenAI's API, keys, limits and refusals.

- routes.py: the routes, and how a request is processed.
- openai.py: the formats of requests and responses.
- bodies.py: JSON bodies of bounded size and shape.
- fields.py: the fields of OpenAI's requests: with effect, ignored, or refused.
- tokens.py: names, bytes and places of single tokens.
- access.py: API keys, and limits for each key.
- refusals.py: errors as HTTP statuses, and the limit on the size of a body.
- events.py: server-sent events.
- sealed.py: seals bodies between Serve's proxy and a replica.
- listening.py: lets Serve's proxy listen at an address, also while Serve runs.

The package imports `serve_app.replica`. `serve_app` deploys the application.
"""
