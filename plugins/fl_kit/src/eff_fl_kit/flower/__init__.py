"""Federated methods on Flower: the server in a ServerApp, the clients on SuperNodes. Needs the extra `flower`."""
