"""The process that serves one device. SERVING.md describes its options, counters, log events and costs."""
