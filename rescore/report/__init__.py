"""What results look like: tables for the terminal."""
