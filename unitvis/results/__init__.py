"""What a scan found, as arrays and as a folder; nothing here draws."""
