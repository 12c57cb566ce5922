"""Policies over a socket, in openpi's websocket protocol: what goes over the wire, the server, the client."""
