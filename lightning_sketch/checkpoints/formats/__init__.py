"""Files of optimizer states, one module for each format."""
