module mini-llm/tests/programs/packer-plugin-hcloud

go 1.21.0

require github.com/hashicorp/packer-plugin-hcloud v1.0.5
