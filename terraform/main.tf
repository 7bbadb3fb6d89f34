# One node behind addresses that stay: a new image, other keys or other facts make a new node, which proves itself before
# the addresses move to it and the old one goes.

locals {
  labels = { product = "mini-llm", deployment = var.name }

  # Nulls are what nobody said; the node's schema knows no nulls.
  api_keys = [for key in var.api_keys : {
    for name, value in merge(key, {
      limits = key.limits == null ? null : { for limit, number in key.limits : limit => number if number != null }
    }) : name => value if value != null
  }]
  acme = var.acme == null ? null : { for name, value in var.acme : name => value if value != null }
  alerts = var.alerts == null ? null : {
    for name, value in merge(var.alerts, {
      mail = try({ for field, text in var.alerts.mail : field => text if text != null }, null)
    }) : name => value if value != null
  }
  handover = var.handover == null ? null : { for name, value in var.handover : name => value if value != true }
  facts = {
    for name, value in {
      domain             = var.domain
      acme               = local.acme
      certificate        = var.certificate
      monitoring         = var.monitoring
      alerts             = local.alerts
      handover           = local.handover
      price_eur_per_hour = var.price_eur_per_hour
      addresses = {
        ipv4 = hcloud_floating_ip.service["ipv4"].ip_address
        ipv6 = cidrhost(hcloud_floating_ip.service["ipv6"].ip_network, 1) # of its 2^64 addresses
      }
    } : name => value if value != null
  }

  # By what makes a key that key: its name and its comment may change, and Hetzner knows no two of the same.
  ssh_keys = {
    for name, key in var.ssh_public_keys : substr(sha256(local.ssh_key_texts[name]), 0, 8) => { name = name, text = local.ssh_key_texts[name] }
  }
  ssh_key_texts = { for name, key in var.ssh_public_keys : name => join(" ", slice(split(" ", trimspace(key)), 0, 2)) }

  proof_key = "mllm_${sha256(terraform_data.node.output.secret)}"
  proof = {
    sha256  = sha256(local.proof_key)
    expires = terraform_data.node.output.proof_ends
  }
}

check "handover" {
  assert {
    condition     = nonsensitive(var.handover != null)
    error_message = "There is no handover key, so a rollout will cut answers in flight; `make handover-key` makes it."
  }
}

# What makes a node another one. The key that it proves itself with is made anew with it, and stays as long as it does; to
# replace a node that hangs: terraform apply -replace=terraform_data.node
resource "terraform_data" "node" {
  input = {
    secret     = "${uuid()}${uuid()}"
    proof_ends = timeadd(timestamp(), "168h") # at the latest; it ends when the node is proved
  }
  triggers_replace = {
    image  = var.image_id
    type   = var.server_type
    place  = var.location
    facts  = nonsensitive(sha256(jsonencode([local.facts, local.api_keys])))
    access = sha256(jsonencode([keys(local.ssh_keys), [for key in data.hcloud_ssh_key.existing : key.fingerprint]]))
    how    = filesha256("${path.module}/../cloud-init/launch.yaml.tftpl")
  }

  lifecycle {
    create_before_destroy = true
    ignore_changes        = [input]

    precondition {
      condition     = (var.acme == null) != nonsensitive(var.certificate == null)
      error_message = "One of acme (to order the certificate) and certificate (to bring it) must be there."
    }
  }
}

resource "hcloud_ssh_key" "operator" {
  for_each = local.ssh_keys

  # Another name for another key: it is made while its predecessor is still there.
  name       = "${var.name}-${each.value.name}-${each.key}"
  public_key = each.value.text
  labels     = local.labels
}

# A project takes a key once, so one that is there for other servers cannot be made again.
data "hcloud_ssh_key" "existing" {
  for_each = var.existing_ssh_keys

  name = each.value
}

resource "hcloud_firewall" "node" {
  name   = var.name
  labels = local.labels

  dynamic "rule" {
    for_each = merge(
      { "80" = ["0.0.0.0/0", "::/0"], "443" = ["0.0.0.0/0", "::/0"] },
      length(var.ssh_sources) > 0 ? { "22" = var.ssh_sources } : {},
    )
    content {
      direction  = "in"
      protocol   = "tcp"
      port       = rule.key
      source_ips = rule.value
    }
  }

  rule {
    direction  = "in"
    protocol   = "icmp"
    source_ips = ["0.0.0.0/0", "::/0"]
  }
}

resource "hcloud_network" "nodes" {
  name     = var.name
  ip_range = var.network
  labels   = local.labels
}

resource "hcloud_network_subnet" "nodes" {
  network_id   = hcloud_network.nodes.id
  type         = "cloud"
  network_zone = "eu-central"
  ip_range     = var.network
}

# What the name's records point to; they outlive every node.
resource "hcloud_floating_ip" "service" {
  for_each = toset(["ipv4", "ipv6"])

  name              = "${var.name}-${each.key}"
  type              = each.key
  home_location     = var.location
  delete_protection = var.protect_address
  labels            = local.labels

  lifecycle {
    ignore_changes = [home_location] # a node in another place has the same addresses
  }
}

resource "hcloud_server" "node" {
  # Another name for each server that is made, also in the place of one whose making failed halfway: both exist for a while.
  name         = "${var.name}-${substr(uuid(), 0, 8)}"
  image        = var.image_id
  server_type  = var.server_type
  location     = var.location
  ssh_keys     = concat([for key in hcloud_ssh_key.operator : key.id], [for key in data.hcloud_ssh_key.existing : key.id])
  firewall_ids = [hcloud_firewall.node.id]
  labels       = merge(local.labels, { image = tostring(var.image_id) })
  user_data = templatefile("${path.module}/../cloud-init/launch.yaml.tftpl", {
    facts = jsonencode(merge(local.facts, { api_keys = local.api_keys, proof = local.proof }))
  })
  # Where a rollout did not get to see to it, what has been accepted is answered before the node goes.
  shutdown_before_deletion = true

  network {
    network_id = hcloud_network.nodes.id
    alias_ips  = [] # without it each plan would attach the network anew
  }

  lifecycle {
    create_before_destroy = true
    # Whose keys are let in is part of what makes a node another one (access, above), not the keys' numbers at the cloud.
    ignore_changes       = [name, ssh_keys]
    replace_triggered_by = [terraform_data.node]
  }

  depends_on = [hcloud_network_subnet.nodes]
}

# The gate: a new node has taken over what it must and answers a generation at its own address, or the addresses stay where
# they are and the apply fails.
resource "terraform_data" "proved" {
  triggers_replace = [hcloud_server.node.id]

  provisioner "local-exec" {
    command = "\"${var.python}\" ../scripts/prove_node.py"
    environment = {
      PROOF_STAGE     = "gate"
      PROOF_ADDRESS   = hcloud_server.node.ipv4_address
      PROOF_DOMAIN    = var.domain
      PROOF_KEY       = local.proof_key
      PROOF_TIMEOUT_S = var.ready_timeout_s
      # A certificate that is still to be ordered cannot be there before the address is.
      PROOF_CERTIFICATE = nonsensitive(var.certificate == null) ? "any" : "valid"
      PROOF_AUTHORITY   = var.proof_authority
    }
    working_dir = path.module
  }
}

resource "hcloud_floating_ip_assignment" "ipv6" {
  floating_ip_id = hcloud_floating_ip.service["ipv6"].id
  server_id      = hcloud_server.node.id

  depends_on = [terraform_data.proved]
}

# Last: somebody is sure to ask there, so the nodes know by it that both have moved.
resource "hcloud_floating_ip_assignment" "ipv4" {
  floating_ip_id = hcloud_floating_ip.service["ipv4"].id
  server_id      = hcloud_server.node.id

  depends_on = [hcloud_floating_ip_assignment.ipv6]
}

# The proof under the real name and address, with the certificate that clients will see; then the old node has given its
# last answer, and the key of the proof ends.
resource "terraform_data" "served" {
  triggers_replace = [hcloud_server.node.id]

  provisioner "local-exec" {
    command = "\"${var.python}\" ../scripts/prove_node.py"
    environment = {
      PROOF_STAGE       = "served"
      PROOF_ADDRESS     = hcloud_floating_ip.service["ipv4"].ip_address
      PROOF_DOMAIN      = var.domain
      PROOF_KEY         = local.proof_key
      PROOF_TIMEOUT_S   = var.ready_timeout_s
      PROOF_CERTIFICATE = "valid"
      PROOF_AUTHORITY   = var.proof_authority
    }
    working_dir = path.module
  }

  depends_on = [hcloud_floating_ip_assignment.ipv4]
}
