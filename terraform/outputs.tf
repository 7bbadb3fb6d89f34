output "url" {
  value       = "https://${var.domain}"
  description = "Where the service is."
}

output "monitoring_url" {
  value       = var.monitoring == null ? null : "https://monitoring.${var.domain}"
  description = "Where its dashboards are, if anybody may see them."
}

output "ipv4_address" {
  value       = hcloud_floating_ip.service["ipv4"].ip_address
  description = "What A records of the domain, and of monitoring.<domain>, point to; with dns_zone they do."
}

output "ipv6_address" {
  value       = cidrhost(hcloud_floating_ip.service["ipv6"].ip_network, 1)
  description = "What AAAA records of both point to; with dns_zone they do."
}

output "node" {
  value       = { name = hcloud_server.node.name, id = hcloud_server.node.id, image_id = var.image_id, ipv4 = hcloud_server.node.ipv4_address }
  description = "The node that serves, and its own address."
}

output "image" {
  value       = { id = var.image_id, version = var.image_version }
  description = "What the node was made from; the version is what `bake.py promote` has told."
}

output "try" {
  value       = "curl -sS https://${var.domain}/generate -H \"Authorization: Bearer $KEY\" -H 'Content-Type: application/json' -d '{\"prompt\": \"What is mini-llm?\"}'"
  description = "A first request; KEY is a key whose hash is among the api_keys."
}
