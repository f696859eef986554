"""The contract of each op: its public function, its schema and its fake kernel. The maths is in `backends/`."""
