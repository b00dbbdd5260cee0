"""From candidates in half precision to the exact result."""
