"""The only place that names DeepSpeed's symbols: ledger, supported versions, requirements."""
