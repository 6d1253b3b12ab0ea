"""The only place that names upstream symbols: import watcher, ledger, patches, version window."""
