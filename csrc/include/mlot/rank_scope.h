// Which rows rank_truncate ranks together.
#pragma once

namespace mlot {

enum class RankScope { sequence, batch, token };

}  // namespace mlot
