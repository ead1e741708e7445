"""What stands behind each address: from a body to requests, and from responses to a body."""
