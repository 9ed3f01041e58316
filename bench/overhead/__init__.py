"""What a proxy costs: requests and streamed chunks per CPU-second, and what it adds to latency, beside its peers."""
