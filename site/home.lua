-- The home page has its title from index.qmd: README.md, which it includes, names it once more.
function Header(header)
  if header.level == 1 then
    return {}
  end
end
