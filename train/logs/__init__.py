"""What a run says: progress, metrics, traces, the report, and the batch that broke it."""
