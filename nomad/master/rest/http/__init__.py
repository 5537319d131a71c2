"""What any typed HTTP API over aiohttp needs, and nothing of Nomad's own. The callers: `rest.api` and `rest.webapp`.

routing   handlers whose annotations say what a request must hold and what the answer is
openapi   the document that follows from the same annotations
problems  errors as RFC 9457 documents
guard     who may ask: bearer token, Host header
sse       server-sent events
"""
