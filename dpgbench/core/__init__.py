"""What every room may use: options, cells, errors, seeds, paths. Imports no other room."""
