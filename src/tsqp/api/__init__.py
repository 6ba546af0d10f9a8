"""What clients and the server share: the form of requests and answers, as JSON schemas."""
