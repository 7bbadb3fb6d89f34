# Copy this to terraform.tfvars beside main.tf. The image's id comes from `make bake`.
domain = "llm.example.org"
acme   = { email = "operator@example.org" }

# A zone of this account, if it has the domain's: address records are then made too.
# dns_zone = "example.org"

# KEY=mllm_$(openssl rand -hex 24); printf %s "$KEY" | sha256sum
api_keys = [
  {
    name   = "first"
    sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    limits = { requests_per_minute = 60, tokens_per_day = 200000, parallel = 2 }
  },
]

# P=$(openssl rand -hex 16); openssl passwd -apr1 "$P"
monitoring = { user = "operator", password_hash = "$apr1$f8Vn0cXw$ydb6HbE6kHTv.sEmvvcK/1" }
alerts     = { webhook = "https://hooks.example.org/mini-llm" }

ssh_public_keys = { operator = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKwnvFCpm5vJ4dKtDh1eQ6VtDvsGyF2zPyLYlGvOEbVP" }

# cx33 holds a model of 8B; it costs 8.49 euros a month.
server_type        = "cx33"
price_eur_per_hour = 0.0136
