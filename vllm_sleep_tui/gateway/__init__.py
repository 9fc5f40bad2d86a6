"""One endpoint for every client: it wakes the model that a request names and passes the answer through."""
