"""One device: requests in, scores and receipts out."""
