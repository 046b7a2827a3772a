"""One cell from start to finish, its cost beforehand, and its export."""
