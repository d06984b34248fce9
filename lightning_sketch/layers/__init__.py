"""One layer: its record, the part of it that lies here, and its states in other forms."""
