# The records that lead to the addresses, where the domain is in a zone of the same project; without dns_zone they are made
# by hand, wherever it is.

locals {
  # As the zone calls them: without its own name, and itself @.
  record_names = var.dns_zone == null ? [] : [
    for name in concat([var.domain], var.monitoring == null ? [] : ["monitoring.${var.domain}"]) :
    name == var.dns_zone ? "@" : trimsuffix(name, ".${var.dns_zone}")
  ]
  record_values = {
    A    = hcloud_floating_ip.service["ipv4"].ip_address
    AAAA = cidrhost(hcloud_floating_ip.service["ipv6"].ip_network, 1)
  }
}

data "hcloud_zone" "service" {
  count = var.dns_zone == null ? 0 : 1

  name = var.dns_zone

  lifecycle {
    postcondition {
      condition     = self.mode == "primary"
      error_message = "The zone ${var.dns_zone} is in secondary mode: its records are made at its primary name servers."
    }
  }
}

resource "hcloud_zone_rrset" "service" {
  for_each = { for pair in setproduct(local.record_names, keys(local.record_values)) : "${pair[0]}/${pair[1]}" => pair }

  zone = data.hcloud_zone.service[0].name
  name = each.value[0]
  type = each.value[1]
  # A new node changes nothing here. The records change when the addresses are given up, and then the old ones may be
  # somebody else's within minutes: nobody should remember them for longer.
  ttl     = 300
  records = [{ value = local.record_values[each.value[1]] }]
  labels  = local.labels
}
