module mini-llm/tests/programs/grafana-stand-in

go 1.21.0
