"""The process that serves one device. SERVING.md describes its options and what they cost."""
