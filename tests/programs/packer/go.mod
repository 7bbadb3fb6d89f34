module mini-llm/tests/programs/packer

go 1.21.0

require github.com/hashicorp/packer v1.11.2

replace github.com/zclconf/go-cty => github.com/nywilken/go-cty v1.13.3
