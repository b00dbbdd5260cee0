"""The results of a scan as arrays, a manifest and a folder, without any drawing."""
