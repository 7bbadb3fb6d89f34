# What the deployment costs a month. The provider knows no prices, so they come from a file that scripts/cost.py writes.

variable "monthly_prices_eur" {
  type = object({
    servers       = map(map(number))
    primary_ipv4  = map(number)
    floating_ipv4 = map(number)
    floating_ipv6 = map(number)
  })
  default     = null
  description = "The cloud's price list, euros net a month by location, servers by type before it; `cost.py --terraform` writes it to prices.auto.tfvars.json."
}

output "monthly_cost_eur" {
  value = var.monthly_prices_eur == null ? null : try(
    var.monthly_prices_eur.servers[var.server_type][var.location]
    + var.monthly_prices_eur.primary_ipv4[var.location]
    + var.monthly_prices_eur.floating_ipv4[var.location]
    + var.monthly_prices_eur.floating_ipv6[var.location],
    null,
  )
  description = "Euros net a month of one node, its own IPv4 address and the two floating addresses, without snapshots, traffic beyond what is included, and the second node of a rollout; null until `cost.py --terraform` has fetched the prices."
}
