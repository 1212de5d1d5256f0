// The temperatures of one call, as kernels take them.
#pragma once

#include <vector>

namespace mlot::cuda {

constexpr int kMostTemperatures = 16;  // arguments of a kernel: longer lists are refused in Python

struct Temperatures {
  int count;
  double at[kMostTemperatures], factor[kMostTemperatures];  // factor: log2(e) / temperature
};

inline Temperatures temperatures_of(const std::vector<double>& given) {
  Temperatures made{int(given.size()), {}, {}};
  for (int r = 0; r < made.count; ++r) made.at[r] = given[r], made.factor[r] = 1.4426950408889634 / given[r];
  return made;
}

// One temperature, or two of which `hot` is twice `cold`, so that one exp makes both. -1: there is no second one.
struct TemperatureGroup {
  int hot, cold;
};

// The first group has the first temperature.
inline std::vector<TemperatureGroup> groups_of(const Temperatures& temperatures) {
  std::vector<TemperatureGroup> groups;
  bool grouped[kMostTemperatures] = {};
  for (int r = 0; r < temperatures.count; ++r) {
    if (grouped[r]) continue;
    TemperatureGroup group{r, -1};
    for (int s = r + 1; s < temperatures.count && group.cold < 0; ++s) {
      const double one = temperatures.at[r], other = temperatures.at[s];
      if (grouped[s] || (one != 2 * other && other != 2 * one)) continue;
      group = one > other ? TemperatureGroup{r, s} : TemperatureGroup{s, r};
      grouped[s] = true;
    }
    groups.push_back(group);
  }
  return groups;
}

}  // namespace mlot::cuda
