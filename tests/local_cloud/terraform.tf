# What the real provider is tried with; the values come from the test.
terraform {
  required_providers {
    hcloud = {
      source = "hetznercloud/hcloud"
    }
  }
}

variable "name" { type = string }
variable "label" { type = string }
variable "image" { type = string }
variable "public_key" { type = string }

resource "hcloud_ssh_key" "operator" {
  name       = "operator"
  public_key = var.public_key
}

resource "hcloud_primary_ip" "node" {
  name        = "node"
  type        = "ipv4"
  location    = "fsn1"
  auto_delete = false
}

data "hcloud_image" "node" {
  id = var.image
}

resource "hcloud_placement_group" "nodes" {
  name = "nodes"
  type = "spread"
}

resource "hcloud_firewall" "nodes" {
  name   = "nodes"
  labels = { version = var.label }
  rule {
    description = "the operator"
    direction   = "in"
    protocol    = "tcp"
    port        = "22"
    source_ips  = ["0.0.0.0/0", "::/0"]
  }
  rule {
    direction  = "in"
    protocol   = "icmp"
    source_ips = ["0.0.0.0/0", "::/0"]
  }
}

resource "hcloud_floating_ip" "service" {
  name          = "service"
  type          = "ipv4"
  home_location = "fsn1"
}

resource "hcloud_floating_ip_assignment" "service" {
  floating_ip_id = hcloud_floating_ip.service.id
  server_id      = hcloud_server.node.id
}

resource "hcloud_network" "inner" {
  name     = "inner"
  ip_range = "10.0.0.0/16"
  labels   = { version = var.label }
}

resource "hcloud_network_subnet" "nodes" {
  network_id   = hcloud_network.inner.id
  type         = "cloud"
  network_zone = "eu-central"
  ip_range     = "10.0.1.0/24"
}

resource "hcloud_network_route" "beyond" {
  network_id  = hcloud_network.inner.id
  destination = "10.100.1.0/24"
  gateway     = "10.0.1.5"
}

resource "hcloud_zone" "service" {
  name   = "terraform.example"
  mode   = "primary"
  ttl    = var.label == "first" ? 3600 : 7200
  labels = { version = var.label }
}

resource "hcloud_zone_rrset" "apex" {
  zone    = hcloud_zone.service.name
  name    = "@"
  type    = "A"
  ttl     = 60
  labels  = { version = var.label }
  records = [{ value = hcloud_floating_ip.service.ip_address, comment = var.label }]
}

resource "hcloud_zone_rrset" "words" {
  zone              = hcloud_zone.service.name
  name              = "words"
  type              = "TXT"
  change_protection = var.label == "first"
  records           = [{ value = provider::hcloud::txt_record("version ${var.label}") }]
}

resource "hcloud_zone_record" "one" {
  for_each = toset(["192.0.2.1", "192.0.2.2"])

  zone  = hcloud_zone.service.name
  name  = "several"
  type  = "A"
  value = each.value
}

data "hcloud_zone" "service" {
  name       = hcloud_zone.service.name
  depends_on = [hcloud_zone_rrset.words]
}

resource "hcloud_server" "node" {
  name               = var.name
  server_type        = "cx23"
  location           = "fsn1"
  image              = data.hcloud_image.node.id
  ssh_keys           = [hcloud_ssh_key.operator.id]
  firewall_ids       = [hcloud_firewall.nodes.id]
  placement_group_id = hcloud_placement_group.nodes.id
  labels             = { made = "by-terraform", version = var.label }
  user_data          = "#cloud-config\n"
  public_net {
    ipv4_enabled = true
    ipv4         = hcloud_primary_ip.node.id
    ipv6_enabled = false
  }
  network {
    network_id = hcloud_network.inner.id
    ip         = "10.0.1.5"
    alias_ips  = ["10.0.1.6"]
  }
  depends_on = [hcloud_network_subnet.nodes]
}
