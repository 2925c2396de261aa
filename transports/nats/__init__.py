"""The node's door to NATS: its broker, its connection, requests in, health and reports out."""
