"""The HTTP door: one app for a model's own port and for the gateway, on real sockets."""
