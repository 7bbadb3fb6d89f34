# Copy this to terraform.tfvars beside main.tf, and put your own in place of what is in it. The image's id comes from `make bake`.
domain = "llm.example.org"
acme   = { email = "operator@example.org" }

# A zone of this project, if it has the domain's: address records are then made too.
# dns_zone = "example.org"

# Who may use it: KEY=mllm_$(openssl rand -hex 24); echo "$KEY"; printf %s "$KEY" | sha256sum
api_keys = [
  {
    name   = "first"
    sha256 = "the SHA-256 of a key of yours"
    limits = { requests_per_minute = 60, tokens_per_day = 200000, parallel = 2 }
  },
]

# Who may look at its dashboards: P=$(openssl rand -hex 16); echo "$P"; openssl passwd -apr1 "$P"
# monitoring = { user = "operator", password_hash = "what that prints" }

# Who hears of alerts.
# alerts = { webhook = "https://hooks.example.org/mini-llm" }

# Who may log in; without any nobody can. A key that the project has already is named as it is there.
# ssh_public_keys   = { operator = "ssh-ed25519 …" }
# existing_ssh_keys = ["laptop"]

# cx33 holds a model of 8B; it costs 8.49 euros a month.
server_type        = "cx33"
price_eur_per_hour = 0.0136
