"""The data path: request to backend to client, observing as it forwards."""
